"""The embedded world of coloured shapes on a grid."""
