"""What a run left, taken home: its metrics, its parameters and its model, without the data."""
