"""What a cache format costs in accuracy, measured on real text: `quantpage evaluate`.

text     a book to read, and where it comes from
caches   what is compared: our formats, and the quantized caches of Transformers
score    teacher-forced log-probabilities through a cache, and how two of them differ
heads    where a format loses: attention's output of every layer and head
needle   a number hidden in a text, asked for at its end
answers  the model's own answers, and how long another cache gives the same
report   the rows as CSV, as markdown and on the terminal
run      all of it, for a model folder, a text and a list of names
"""
