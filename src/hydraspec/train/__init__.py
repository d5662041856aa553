"""Training draft heads on a frozen base model."""
