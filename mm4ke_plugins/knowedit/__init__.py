"""KnowEdit's records and EasyEdit's teacher-forced metrics."""
