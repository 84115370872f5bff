"""Search spaces, one YAML file each; `cifar_dist.search` reads and checks them."""
