"""Generated from proto/mooring/v1 by `python -m tools.protos generate`; not edited by hand."""
