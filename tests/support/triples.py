"""Questions, each with a passage that answers it and one that only shares its words."""

from __future__ import annotations

# Question, a passage that answers it, one that shares more words with it and does not.
TRIPLES = [
    (
        "how long does it take to boil an egg?",
        "A hard-boiled egg needs ten to twelve minutes in simmering water, a soft-boiled one about six.",
        "Drawing an egg well takes a long time, since an egg has no edges and its shading is soft.",
    ),
    (
        "why is the sky blue?",
        "Air molecules scatter the short, blue wavelengths of sunlight more than the red ones, which colours the sky.",
        "She painted the walls of the nursery blue and hung a picture of a night sky above the bed.",
    ),
    (
        "who wrote Pride and Prejudice?",
        "Pride and Prejudice is an 1813 novel by the English author Jane Austen.",
        "The film of Pride and Prejudice was shot on location in Derbyshire and Wiltshire.",
    ),
    (
        "what causes rust on iron?",
        "Iron rusts when it reacts with oxygen and water, which forms a flaky layer of iron oxide.",
        "Iron is mined in Australia, Brazil and China, and most of it is made into steel.",
    ),
    (
        "how do I undo the last git commit?",
        "To take back the most recent commit but keep its changes, run git reset --soft HEAD~1.",
        "A git commit records a snapshot of the staged files together with a message and an author.",
    ),
    (
        "what is the capital of Australia?",
        "Canberra is the capital city of Australia, founded as a compromise between Sydney and Melbourne.",
        "Australia exports coal, iron ore, wool and wine, and its currency is the Australian dollar.",
    ),
    (
        "can dogs eat chocolate?",
        "Chocolate is poisonous to dogs: the theobromine in it can cause seizures and even death.",
        "Hot dogs and chocolate ice cream were the best-selling snacks at the stadium.",
    ),
    (
        "when did the Berlin Wall fall?",
        "The Berlin Wall came down on 9 November 1989, when the border crossings were opened.",
        "Berlin has many museums, and parts of its old city wall can be seen near the courthouse.",
    ),
    (
        "symptoms of vitamin D deficiency",
        "People who lack vitamin D may suffer from bone pain, muscle weakness and tiredness.",
        "Vitamin C is found in oranges, peppers and broccoli, and is easily destroyed by cooking.",
    ),
    (
        "how does a vaccine work?",
        "A vaccine shows the immune system a harmless part of a germ, so that antibodies are ready for the real one.",
        "The vaccine factory employs four hundred people who work in three shifts.",
    ),
    (
        "boiling point of water at high altitude",
        "On a mountain, where the air pressure is lower, water boils at less than 100 degrees Celsius.",
        "High altitude training camps are popular with long-distance runners and cyclists.",
    ),
    (
        "difference between a crocodile and an alligator",
        "An alligator has a broad, rounded snout, while a crocodile's is narrow and shows its lower teeth.",
        "The crocodile handbag was sold for twice as much as the leather one.",
    ),
    (
        "how to remove red wine from a carpet",
        "To get a red wine stain out of a carpet, blot it at once, then apply baking soda and cold water.",
        "Celebrities walked the red carpet before a dinner at which French wine was served.",
    ),
    (
        "why do cats purr?",
        "Cats purr when they are content, and also to calm themselves when they are hurt.",
        "Cats and dogs are kept as pets all over the world and need to be fed every day.",
    ),
    (
        "what does the mitochondrion do?",
        "Mitochondria produce most of a cell's ATP, the molecule that supplies it with energy.",
        "The mitochondrion has been drawn by students in biology exams for many decades.",
    ),
    (
        "fastest land animal",
        "The cheetah is the quickest animal on land and can run at more than 100 kilometres an hour.",
        "The animal shelter bought a piece of land outside the city to build more kennels.",
    ),
    (
        "how is cheese made?",
        "To make cheese, milk is curdled with rennet, the whey is drained and the curds are pressed and aged.",
        "Cheese goes well with bread, grapes and red wine, and is eaten after dinner in France.",
    ),
    (
        "what did Marie Curie discover?",
        "Marie Curie and her husband Pierre discovered two elements, polonium and radium.",
        "The Marie Curie high school has a swimming pool, a library and a large sports ground.",
    ),
    (
        "how can I sleep better at night?",
        "For better sleep, go to bed at regular hours, avoid coffee after lunch and keep the bedroom dark.",
        "The night train from Vienna to Rome has seats, couchettes and sleeping cars.",
    ),
    (
        "what is inflation in economics?",
        "In economics, inflation is a general rise in prices, so that money buys less than before.",
        "The inflation of a hot-air balloon takes half an hour and a powerful fan.",
    ),
]
