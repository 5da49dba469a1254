"""Write every dashboard's JSON to deploy/grafana. Run it after a change of these files."""

from __future__ import annotations

from tools.dashboards.all import FOLDER, rendered


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
