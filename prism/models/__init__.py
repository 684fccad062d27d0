"""The models: prompts and images, forward passes over packs, the policy, tiny models, and how a run builds them."""
