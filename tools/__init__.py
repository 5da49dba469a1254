"""Commands for developers; not part of any distribution."""
