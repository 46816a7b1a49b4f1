"""What a round costs: floating-point operations, bytes, simulated seconds."""
