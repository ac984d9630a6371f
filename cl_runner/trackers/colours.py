"""The colours of every picture and page: perceptually uniform, and distinct in greyscale."""

INK, FAINT = "#22303c", "#7b8791"

# Equal steps of OKLab lightness, from 0 to 1.
ACCURACY = ["#ebfbf3", "#bbe8dc", "#8ad3ce", "#5abbc4", "#33a1ba", "#2085ab", "#256996", "#2c4e79", "#2a3658"]

# From -1 (all gained) through 0 to 1 (all lost).
GAINED = ["#2a5885", "#277bab", "#3c9fc5", "#70c0d6", "#b1dee3"]
LOST = ["#f8c9af", "#f19a74", "#dd6d49", "#bc4931", "#903029"]
FORGETTING = [*GAINED, "#f7f7f7", *LOST]

# For lines: readable on white and on near-black.
LINES = ["#2f7fb8", "#d9682f", "#3f9a5f", "#b0559f", "#9a7b1e", "#5a6fd0", "#c94a5a", "#2d9a9a", "#7a8691", "#8a5a3c"]
