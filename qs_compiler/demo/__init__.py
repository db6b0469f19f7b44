"""A small video diffusion transformer, really trained, with the data, the training and the checks that it came from.

captions.py   what a clip may show, said in words; which captions are held out
data.py       procedural clips of such captions, seeded, the same on every device
text.py       tokenizer and caption encoder
model.py      diffusers' own WanTransformer3DModel at 8 M parameters, its weights, and a sampler
train.py      `python -m qs_compiler.demo.train`
check.py      colour and direction of a clip's main object, read off its pixels
sheet.py      clips side by side as one picture
"""
