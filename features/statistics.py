"""Mean and standard deviation of each channel of a set's latents, as training sees them; of sums, part by part."""

import numpy as np


def can_be_moments(rows):
    """Returns whether the second half of the channels of rows `(n, C, h, w)` can be standard deviations."""
    channels = rows.shape[1]
    return channels % 2 == 0 and bool((rows[:, channels // 2 :] > 0).all())


def channel_sums(rows, channels):
    """Returns the sums `(3, C)`, float64, of rows `(n, C, h, w)`, or `(n, 2C, h, w)` with moments: mean, then std.

    They are those of x, of x squared, and the number of values. Of moments they are those of the posterior's samples.
    """
    values = rows.astype("float64")
    squares = np.square(values).sum(axis=(0, 2, 3)).reshape(-1, channels).sum(axis=0)  # of a sample: mean**2 + std**2
    return np.stack([values[:, :channels].sum(axis=(0, 2, 3)), squares, np.full(channels, float(values[:, 0].size))])


def channel_statistics(sums):
    """Returns `(mean, std)`, each `(C,)`, of sums `(3, C)` of `channel_sums`."""
    mean, square = sums[:2] / sums[2]
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def sample_statistics(sums):
    """Returns the same for values that are a sample of more: `std` with n - 1 in place of n."""
    mean, std = channel_statistics(sums)
    return mean, std * np.sqrt(sums[2] / np.maximum(sums[2] - 1, 1))


def total_std(mean, channel_std):
    """Returns the standard deviation of all values, of each channel's mean and standard deviation `(C,)`."""
    return float(np.sqrt(np.mean(channel_std**2) + np.var(mean)))


def statistics_entries(sums):
    """Returns the statistics of `channel_statistics` as entries of a set's manifest."""
    mean, std = channel_statistics(sums)
    return {"channel_mean": mean.tolist(), "channel_std": std.tolist()}
