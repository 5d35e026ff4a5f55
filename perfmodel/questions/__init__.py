"""What people ask of predictions: which is faster, why, what instead, over which grid."""
