"""What policy and discriminator do on held-out problems."""
