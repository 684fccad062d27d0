"""Tiny models built offline, and what the policy and the discriminator share: prompts, images, the vision tower."""
