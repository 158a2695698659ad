"""Keys of Axolotl that fusewright has no use for: other engines' kernels, plugins and methods.

``kernels`` has switches of speed, ``plugins`` what extensions read, ``methods`` what is no
supervised training, ``clouds`` what services that train read. The other files have the groups of
keys inside these.
"""
