"""The discriminator: a vision-language backbone, dense or Mixture-of-Experts, with one value head, on packed groups."""
