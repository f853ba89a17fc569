from bench.diagnose.unseen.run import main
from bench.diagnose.unseen4.parts import PARTS

main(PARTS)
