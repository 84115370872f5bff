"""Search spaces, one YAML file each; `cifar_dist.spaces` reads and checks them."""
