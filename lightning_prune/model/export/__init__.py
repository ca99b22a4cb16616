"""Models as files that other programs read: safetensors, plain or compressed, ONNX, and programs of torch.export."""
