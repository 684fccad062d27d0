"""The PRISM trainer: fine-tuning, adversarial alignment and reinforcement learning of vision-language models.

Nothing is imported here, so that the command line answers before torch is loaded.
"""
