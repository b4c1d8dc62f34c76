"""Gaussian diffusion: `create_diffusion(...)` and what it is made of. Needs paddle and numpy only."""

from .diffusion_utils import host_value, with_host_value
from .gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .respace import SpacedDiffusion, space_timesteps
from .timestep_sampler import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler

__all__ = ["GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "SpacedDiffusion", "create_diffusion"]
__all__ += ["LossSecondMomentResampler", "UniformSampler", "create_named_schedule_sampler"]
__all__ += ["get_named_beta_schedule", "host_value", "space_timesteps", "with_host_value"]


def create_diffusion(
    timestep_respacing,
    noise_schedule="linear",
    use_kl=False,
    sigma_small=False,
    predict_xstart=False,
    learn_sigma=True,
    rescale_learned_sigmas=False,
    diffusion_steps=1000,
    min_snr_gamma=None,
):
    """Returns a `SpacedDiffusion` from plain settings; all arguments but the last are those of the official DiT code.

    Args:
        timestep_respacing: "" or None for all steps (training); "250", "ddim25", [10, 20]: see `space_timesteps`.
        noise_schedule: "linear" or "squaredcos_cap_v2".
        use_kl: train on the variational bound (RESCALED_KL) instead of the squared error.
        sigma_small: without `learn_sigma`, the variance is the posterior's instead of beta.
        predict_xstart: the model predicts x_0 instead of the noise.
        learn_sigma: the model has twice the output channels and learns the variance.
        rescale_learned_sigmas: weight the variance's loss by steps / 1000 (RESCALED_MSE).
        diffusion_steps: steps of the process before respacing.
        min_snr_gamma: weight the squared error by timestep, not beside `use_kl`: see `GaussianDiffusion`; None for not.

    Raises:
        ValueError: a value that is not accepted; the message names those that are.
    """
    flags = {"use_kl": use_kl, "sigma_small": sigma_small, "predict_xstart": predict_xstart}
    flags.update(learn_sigma=learn_sigma, rescale_learned_sigmas=rescale_learned_sigmas)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected True or False")
    betas = get_named_beta_schedule(noise_schedule, diffusion_steps)
    squared = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    whole = timestep_respacing is None or timestep_respacing == ""
    return SpacedDiffusion(
        use_timesteps=space_timesteps(diffusion_steps, [diffusion_steps] if whole else timestep_respacing),
        betas=betas,
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else squared,
        min_snr_gamma=min_snr_gamma,
    )
