"""Language models and text encoders at work on prompts: to judge them, to vary them, to tell them apart."""
