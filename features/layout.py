"""Names of everything that belongs to a feature set."""

import os


class Layout:
    """The paths of the set NAME under FEATURES_PATH.

    Shards are written in `partial`, and made into pairs in `unpacking`. `state` is the folder of an extraction that is
    not finished, with its settings and the list of its images; `encoder_state` that of encoder features.
    """

    def __init__(self, features_path, name):
        self.features_path, self.name = features_path, name
        self.features, self.flipped, self.labels = map(self.path, ("features", "features_flip", "labels"))
        self.packed, self.partial, self.unpacking = map(self.path, ("packed", "packed.partial", "unpacking"))
        self.classes, self.manifest = self.path("classes.json"), self.path("manifest.json")
        self.checksums, self.index = self.path("checksums.txt"), self.path("index.npz")
        self.encoder, self.encoder_flipped = map(self.path, ("encoder", "encoder_flip"))
        self.encoder_checksums = self.path("encoder_checksums.txt")
        self.state, self.encoder_state = self.path("extraction"), self.path("encoding")
        self.settings, self.images = os.path.join(self.state, "settings.json"), os.path.join(self.state, "images.npz")

    def path(self, what):
        """Returns the path of another file or folder of the set."""
        return os.path.join(self.features_path, f"{self.name}_{what}")

    def existing(self):
        """Returns what is there of a set, or of one that is being written."""
        kinds = ("features", "flipped", "labels", "packed", "partial", "unpacking", "classes", "checksums", "manifest")
        kinds += ("encoder", "encoder_flipped", "encoder_checksums")
        paths = [getattr(self, kind) for kind in kinds]
        return [path for path in paths if os.path.isfile(path) or os.path.isdir(path) and os.listdir(path)]
