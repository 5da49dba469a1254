"""What an adapter does to the base: drift probe, judges, metrics, certificate, report."""
