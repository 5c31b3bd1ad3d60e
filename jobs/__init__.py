"""What a person launches: typed commands and vetted recipes. No math and no loop lives here."""
