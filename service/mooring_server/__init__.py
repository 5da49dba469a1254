"""The Mooring service: personalise a resident text-to-image model for many customers, within a budget."""
