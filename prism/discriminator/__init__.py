"""The discriminator: a dense or Mixture-of-Experts vision-language backbone with a value head, on packed groups."""
