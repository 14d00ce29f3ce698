"""slmops: a fine-tuned small language model, on the device, at the precision that serves it best."""
