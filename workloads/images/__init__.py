"""Small image datasets: MNIST and its like, made ready once and read by every rank."""
