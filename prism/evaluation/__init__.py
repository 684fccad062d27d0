"""Policy and discriminator measured on held-out problems."""
