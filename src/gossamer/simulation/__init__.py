"""Devices, costs and traffic of participants, in simulated seconds."""
