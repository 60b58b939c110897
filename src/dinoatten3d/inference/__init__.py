"""Run + scan -> Prediction and maps in the scan's own space."""
