"""Table or BIDS folder -> Scan -> Volume (RAS+, mm) -> Slices."""
