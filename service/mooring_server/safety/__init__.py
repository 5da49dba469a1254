"""Content safety: what may be asked for, and what of the pictures may be handed out."""
