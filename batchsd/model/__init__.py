"""The networks, ours, in torch: U-Net and VAE with diffusers' parameter names, and the door to transformers."""
