"""Adapters on their way to a slot: device slots ← host memory ← local disk ← object store.

`host.AdapterTiers` is what others use; `AdapterBank` is the device tier itself.
"""
