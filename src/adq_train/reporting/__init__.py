"""Reports: progress, TensorBoard, pictures and the summary of a run."""
