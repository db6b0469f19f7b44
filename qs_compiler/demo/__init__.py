"""A small video diffusion transformer, really trained, with the data, the training and the checks that it came from.

captions.py   what a clip may show, said in words; which captions are held out
data.py       procedural clips of such captions, seeded, the same on every device
text.py       tokenizer and caption encoder
model.py      diffusers' own WanTransformer3DModel at 8 M parameters, its weights, and a sampler
train.py      `python -m qs_compiler.demo.train`
check.py      colour and direction of a clip's main object, read off its pixels
sheet.py      clips side by side as one picture

trace.py      one clip sampled, with the state, phase and kept blocks of its steps
metrics.py    a clip against its uncompressed twin; bytes of weights
run.py        `quantsparse demo`: its figures in words (summary.py), on the terminal (terminal.py), as pictures
              (figures.py) and as an HTML page (report.py)
evaluate.py   `quantsparse eval`: many captions and noises, recipe by recipe
calibration_set.py      what both calibrate on
"""
