"""Files: checkpoints, images, videos and contact sheets, written atomically."""
