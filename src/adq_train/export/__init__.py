"""Small models to ship: packed files, ONNX, and what reads and checks them."""
