"""One vocabulary for the flags of all commands: what else a flag is called. Standard library only."""

# Names that other commands have for a flag: PaddleMIX's, those of the official DiT and SiT, earlier ones of this
# project's tools. `config.flags.CommandParser` takes them wherever the flag is one, and does not show them.
OTHER_NAMES = {
    "feature_path": ("features_path",),
    "image_size": ("resolution",),
    "vae": ("vae_name_or_path", "vae_model"),
    "model_path": ("model_weights", "model_file", "pipeline", "ckpt"),
    "guidance_scale": ("cfg_scale",),
    "num_inference_steps": ("num_sampling_steps",),
    "seed": ("global_seed",),
    "learning_rate": ("lr",),
    "num_workers": ("dataloader_num_workers",),
    "data_path": ("data",),
    "epochs": ("num_train_epochs",),
    "resume": ("resume_from_checkpoint",),
    "logging_steps": ("log_every",),
    "save_steps": ("ckpt_every",),
}
# What else a flag that is unknown to a command may have meant there; its value is another thing than the flag's.
MEANINGS = {
    **{other: (name,) for name, others in OTHER_NAMES.items() for other in others},
    "batch_size": ("per_device_train_batch_size", "global_batch_size"),
    "per_proc_batch_size": ("batch_size", "per_device_train_batch_size", "global_batch_size"),
    "per_device_train_batch_size": ("batch_size", "global_batch_size"),
    "global_batch_size": ("per_device_train_batch_size", "batch_size"),
    "steps": ("max_steps", "num_inference_steps"),
    "num_steps": ("num_inference_steps", "max_steps"),
    "num_fid_samples": ("num_images",),
    "weights": ("model_path",),
    "checkpoint_path": ("output", "model_path"),
    "checkpoint": ("model_path", "resume"),
    "ckpt": ("model_path", "pretrained_model_path"),
    "pretrained_model_name_or_path": ("pretrained_model_path", "model_path"),
    "sample_every": ("image_logging_steps",),
    "prediction_type": (),  # not what a SiT's --prediction is
    "save_ema": ("key",),
    "sampling_method": ("method",),
    **dict.fromkeys(("output_dir", "results_dir", "sample_dir", "report", "json", "output_path"), ("output",)),
}
# Settings that the official scripts have a flag for, and that a model or a config brings along here.
OF_THE_MODEL = ("model", "image_size", "num_classes")
