"""`lora-lab eval`: lm-eval's own command with our model."""
