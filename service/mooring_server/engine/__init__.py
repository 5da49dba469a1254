"""The engine owns the device: base models, the adapter bank, samplers and the thread that runs ticks."""
