"""How far a model's predictions and attention move when its cache is compressed."""
