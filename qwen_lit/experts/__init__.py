"""The experts of a layer: held in 4 bits while they are read, computed as far as tokens pass them, adapted by LoRA."""
