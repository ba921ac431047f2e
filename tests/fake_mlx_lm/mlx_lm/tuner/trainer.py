class TrainingArgs:
    pass


def default_loss(model, batch, lengths):
    return None


def iterate_batches(dataset, batch_size, max_seq_length, loop=False, seed=None, comm_group=None):
    return iter(())


def train(
    model,
    optimizer,
    train_dataset,
    val_dataset=None,
    args=TrainingArgs(),  # noqa: B008 - as mlx-lm has it
    loss=default_loss,
    iterate_batches=iterate_batches,
    training_callback=None,
):
    return None
