"""Search spaces, one YAML file each; `cifar_dist.search.space` reads and checks them."""
