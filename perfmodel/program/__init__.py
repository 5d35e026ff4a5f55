"""What a step is made of: dims, dtypes, ops and the parts they run in."""
