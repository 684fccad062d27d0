"""The commands besides `prism run`, and what is checked before torch is imported."""
