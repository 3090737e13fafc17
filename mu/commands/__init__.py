"""What fetches data and models and makes environments: download_data, download_model, create_env. No torch here."""
