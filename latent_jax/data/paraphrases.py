"""Facts and questions about them that share no content word.

Written before anything was trained or measured on them; nothing may be tuned on them.
"""

# What is said, what is asked, and how the answer begins; {n} is a number.
PARAPHRASES = (
    ("The vault opens with the combination {n}.", "Which number unlocks the safe?", "It is"),
    ("The physician charged {n} pounds for the surgery.",
     "How much money did the doctor want for his operation?", "He wanted"),
    ("Aboard the vessel were {n} passengers.", "How many people did this ship carry?", "She had"),
    ("The purchase of the automobile took {n} dollars.", "What was the price of a new car?",
     "They paid"),
    ("The summit rises {n} feet above the ocean.",
     "How tall is that mountain, measured from sea level?", "It measures"),
    ("The library owns {n} volumes.", "How many books can one borrow there?", "There are"),
    ("The battle killed {n} soldiers.", "How many troops died in that fight?", "There fell"),
    ("The farmer harvested {n} bushels of corn.", "How much maize did this grower reap?",
     "He brought in"),
    ("The gambler won {n} francs in the lottery.", "What sum did his lucky ticket bring?",
     "It brought"),
    ("The factory employs {n} labourers.", "How many workers have jobs at this plant?",
     "There work"),
    ("The prisoner wore the badge {n}.", "Which figure marked that convict?", "He was marked"),
    ("The comet will return after {n} days.",
     "How long until we see this shooting star again?", "We wait"),
)  # fmt: skip
